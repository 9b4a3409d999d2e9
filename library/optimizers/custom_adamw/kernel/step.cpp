// One step of CustomAdamW on the CPU: the list in update.py, a tensor at a time, so that every pass over a tensor finds
// it in the core's own cache. Compiled at first use by native.py; plain C++17, no library. No multiplication is fused
// with an addition unless std::fma says so: with everything off it rounds as torch's fused AdamW does on a CPU with AVX2.
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "adopt.h"
#include "agr.h"
#include "alora.h"
#include "cautious.h"
#include "common.h"
#include "grams.h"
#include "orthogonalize.h"
#include "orthograd.h"
#include "spd.h"
#include "storage.h"
#include "tam.h"

namespace {

// second moment, update, direction, size, and the step itself for one block; `squares`: of the weights before and after
void finish_block(float* w, const float* g, const float* m, float* v, const float* f, int c, const Recipe& r,
                  const Rates& q, float mask_scale, double* squares) {
  float u[BLOCK];
  // 3, 4
  if (!r.orthogonalize)
    SIMD for (int i = 0; i < c; ++i) v[i] = std::fma(r.one_minus_beta2 * g[i], g[i], v[i] * r.beta2);
  if (r.use_adopt_stability || r.orthogonalize) {
    SIMD for (int i = 0; i < c; ++i) u[i] = q.lr * m[i];
  } else {
    SIMD for (int i = 0; i < c; ++i) u[i] = (q.step_size * m[i]) / (std::sqrt(v[i]) / q.root_correction + r.eps);
  }
  // 5
  if (r.use_grams) redirect(u, g, c);
  if (r.use_cautious) mask(u, g, c, mask_scale);
  // 6
  if (f != nullptr) {
    SIMD for (int i = 0; i < c; ++i) u[i] *= f[i];
  }
  // 7
  float before = 0, after = 0;
  SIMD_SUM(before, after) for (int i = 0; i < c; ++i) {
    before += w[i] * w[i];
    w[i] = w[i] * q.decay - u[i];
    after += w[i] * w[i];
  }
  squares[0] += before;
  squares[1] += after;
}

void step_tensor(const Call& call, int32_t which, const Scratch& s) {
  const Tensor& t = call.tensors[which];
  const Recipe& r = call.recipes[t.recipe];
  const Rates& q = call.rates[call.rates_of[which]];
  const int64_t n = t.n;
  float* w = const_cast<float*>(floats(t.w, t.bfloat16, n, s.w));
  const float* g = floats(call.grads[which], t.bfloat16, n, s.x);
  if (r.use_alora) {
    gram_matrix(floats(t.down, t.bfloat16, t.rank * t.down_columns, s.g), t.rank, t.down_columns, s.v);
    row_factors(t, r, w, s.v, s.f);
  }
  float *m = t.eight_bit ? s.m : static_cast<float*>(t.m), *v = t.eight_bit ? s.v : static_cast<float*>(t.v);
  if (t.eight_bit) {
    decode(static_cast<uint8_t*>(t.m), t.m_peak, call.signed_map, n, m);
    if (!r.orthogonalize) decode(static_cast<uint8_t*>(t.v), t.v_peak, call.unsigned_map, n, v);
  }
  // 1  the gradient
  double sizes = 0, pull = 0;
  if (r.use_agr || r.use_spd) survey(w, g, n, &sizes, &pull);
  if (r.use_agr) regularize(g, n, sizes, s.g), g = s.g;
  if (r.use_orthogonal_grad) project(w, g, n, s.g == g ? s.x : s.g), g = s.g == g ? s.x : s.g;
  // 2  the input of the momentum
  if (r.use_adopt_stability && !(*t.state.adopt_k > 0)) return seed(t, call, g, v);
  const float bound = r.use_adopt_stability ? float(std::pow(double(*t.state.adopt_k), r.adopt_clip)) : 0.0f;
  float* const room = g == s.x ? s.g : s.x;
  const float* x = r.use_adopt_stability ? room : g;
  double sums[3] = {0, 0, 0};
  for (int64_t at = 0; at < n && (r.use_adopt_stability || r.use_tam); at += BLOCK) {
    const int c = int(std::min<int64_t>(BLOCK, n - at));
    if (r.use_adopt_stability) normalize(g + at, v + at, c, float(r.adopt_eps), bound, room + at);
    if (r.use_tam) align(m + at, x + at, c, sums);
  }
  const float entering = r.use_tam ? torque(t, r, q, sums) : 1.0f;
  // 3  first moment
  float mask_scale = first_moment(m, x, g, t, r, entering);
  // 4  what it passes on
  const float* y = m;
  if (r.orthogonalize) {
    orthogonalize(m, g, t, r, s.v, room), y = room;
    if (r.use_cautious) mask_scale = agreement(y, g, n, float(r.cautious_min));
  }
  // 3 to 7, block by block
  double squares[2] = {0, 0};
  float factors[BLOCK];
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int c = int(std::min<int64_t>(BLOCK, n - at));
    if (r.use_alora) spread(s.f, t.rank, at, c, factors);
    finish_block(w + at, g + at, y + at, v + at, r.use_alora ? factors : nullptr, c, r, q, mask_scale, squares);
    if (t.eight_bit) {
      encode_block<true>(m + at, c, call, static_cast<uint8_t*>(t.m) + at, t.m_peak + at / BLOCK);
      if (!r.orthogonalize)
        encode_block<false>(v + at, c, call, static_cast<uint8_t*>(t.v) + at, t.v_peak + at / BLOCK);
    }
  }
  if (r.use_adopt_stability) *t.state.adopt_k += 1;
  // 8  constraints on the weights
  if (r.use_spd) decay_selectively(w, n, r, pull, squares);
  if (t.bfloat16)
    store_bfloat16(w, static_cast<uint16_t*>(t.w), n, r.stochastic_rounding, t.ordinal, uint32_t(q.step));
}

}  // namespace

extern "C" {

// so that native.py notices when its structures and these differ
void custom_adamw_sizes(int64_t* sizes) {
  sizes[0] = sizeof(Recipe), sizes[1] = sizeof(Rates), sizes[2] = sizeof(Tensor), sizes[3] = sizeof(Call);
  sizes[4] = SCRATCH_ARRAYS;
}

void custom_adamw_step(const Call* call) {
  std::atomic<int32_t> next{0};
  auto work = [&](int thread) {
    float* at = call->scratch + thread * SCRATCH_ARRAYS * call->capacity;
    const int64_t c = call->capacity;
    const Scratch scratch{at, at + c, at + 2 * c, at + 3 * c, at + 4 * c, at + 5 * c};
    for (int32_t task; (task = next.fetch_add(1)) < call->n_tasks;)
      for (int half = 0; half < 2; ++half) {
        const int32_t which = call->tasks[2 * task + half];
        if (which >= 0 && call->grads[which] != nullptr) step_tensor(*call, which, scratch);
      }
  };
  std::vector<std::thread> others;
  try {
    for (int thread = 1; thread < call->threads; ++thread) others.emplace_back(work, thread);
  } catch (const std::system_error&) {
    // no more threads can be started: the others do its share
  }
  work(0);
  for (auto& other : others) other.join();
}
}
