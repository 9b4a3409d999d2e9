# Written by `python -m library.optimizers.custom_adamw.page` from the techniques' declarations
from typing import Literal, TypedDict

class Keywords(TypedDict, total=False):
    use_agr: bool
    use_orthogonal_grad: bool
    orthograd_target: Literal["down", "up", "all"]
    use_adopt_stability: bool
    adopt_eps: float
    adopt_clip: float
    use_tam: bool
    tam_beta: float
    tam_bias_correction: bool
    orthogonalize: bool
    orthogonalize_scale: float
    orthogonalize_nesterov: bool
    use_grams: bool
    use_cautious: bool
    cautious_min: float
    use_alora: bool
    alora_ratio: float
    alora_eta: float
    dynamic_weight_decay: bool
    wd_transition_steps: int
    wd_decay_factor: float
    wd_min_ratio: float
    wd_max_progress: float
    wd_schedule: Literal["exponential", "cosine", "sigmoid", "linear", "multi_stage", "adaptive"]
    wd_stages: tuple[tuple[int, float], ...]
    wd_interpolate: bool
    use_spd: bool
    spd_lambda: float
    spd_anchor: Literal["zero", "initial"]
