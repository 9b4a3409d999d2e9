"""Lines of instructions: what the model reads and learns of each kind, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fine_tuning import small_models
from fine_tuning.batches import NO_LOSS, encode, prompt_ids, tensors, token_ids
from fine_tuning.instructions import read_line, read_lines
from library.errors import UserError

TOKENIZER = small_models.tokenizer()
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]


def learnt(item: object, *, longest: int = 512, as_chat: bool = False) -> list[tuple[str, str]]:
    """What is given and what is learnt, as text, of each sample of a line."""
    line = read_line(json.dumps(item), TOKENIZER, place="here", as_chat=as_chat)
    found = []
    for sample in encode([line], TOKENIZER, longest=longest)[0]:
        batch = tensors([sample], fill=0)
        labels = batch["labels"][0]
        assert (batch["input_ids"][0][labels != NO_LOSS] == labels[labels != NO_LOSS]).all()
        found.append(
            tuple(TOKENIZER.decode(batch["input_ids"][0][mask]) for mask in (labels == NO_LOSS, labels != NO_LOSS))
        )
    return found


def test_instructions() -> None:
    assert learnt({"instruction": "Say a.", "output": "a"}) == [
        ("### Instruction:\nSay a.\n\n### Response:\n", "a<|end|>")
    ]
    assert learnt({"instruction": "Say it.", "input": "b", "output": "b", "id": 7}) == [
        ("### Instruction:\nSay it.\n\n### Input:\nb\n\n### Response:\n", "b<|end|>")
    ]
    assert learnt({"instruction": "Say a.", "input": "", "output": "a"}) == learnt(
        {"instruction": "Say a.", "output": "a"}
    )


def test_a_conversation_has_a_sample_for_each_answer() -> None:
    first = "<|system|>Be short.<|end|><|user|>One?<|end|><|assistant|>"
    assert learnt({"messages": CHAT}) == [
        (first, "1<|end|>"),
        (first + "1<|end|><|user|>Two?<|end|><|assistant|>", "2<|end|>"),
    ]  # the template ends an answer by EOS itself: no second one


def test_an_instruction_as_chat() -> None:
    assert learnt({"instruction": "Say", "input": "c", "output": "c"}, as_chat=True) == [
        ("<|user|>Say\n\nc<|end|><|assistant|>", "c<|end|>")
    ]
    assert TOKENIZER.decode(prompt_ids("Say", TOKENIZER, as_chat=True)) == "<|user|>Say<|end|><|assistant|>"


def test_a_text_counts_as_a_whole() -> None:
    assert learnt({"text": "to be"}) == [("", "to be<|end|>")]
    parts = {"instruction": "Say a.", "output": "a"}
    assert learnt(parts | {"text": "Say a.\na"}) == learnt(parts)  # Alpaca's data have both together, too


def test_what_a_prompt_is_given_is_what_was_learnt() -> None:
    line = read_line(json.dumps({"instruction": "Say a.", "output": "a"}), TOKENIZER, place="here")
    (sample,), _ = encode([line], TOKENIZER, longest=99)
    assert list(sample.tokens[: sample.prompt]) == prompt_ids("Say a.", TOKENIZER, as_chat=False)


def test_what_is_too_long_is_cut_and_counted() -> None:
    lines = [
        read_line(json.dumps({"instruction": "ab", "output": "c" * n}), TOKENIZER, place="here") for n in (1, 2, 3, 30)
    ]
    # ### Instruction:, a, b, ### Response: are 4 tokens
    samples, told = encode(lines, TOKENIZER, longest=7)
    assert [len(sample.tokens) for sample in samples] == [6, 7, 7, 7]
    assert [sample.tokens[-1] == TOKENIZER.eos_token_id for sample in samples] == [True, True, False, False]
    assert told == "4 answers, 2 of them cut at 7 tokens"
    samples, told = encode([*lines, read_line('{"text": "short"}', TOKENIZER, place="here")], TOKENIZER, longest=4)
    assert len(samples) == 1
    assert told == "5 answers, 5 of them cut at 4 tokens, 4 left out because their prompts are as long as that"


def test_a_token_that_begins_every_text() -> None:
    class WithBos:
        """As Llama's tokenizer: it sets the first token unless it is told not to."""

        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text: str, *, add_special_tokens: bool = True) -> object:
            tokens = [ord(letter) for letter in text]

            class Encoding:
                input_ids = [1, *tokens] if add_special_tokens else tokens

            return Encoding

    line = read_line('{"instruction": "a", "output": "b"}', TOKENIZER, place="here")
    (sample,), _ = encode([line], WithBos(), longest=99)
    assert sample.tokens[0] == 1
    assert sample.tokens.count(1) == 1
    assert sample.tokens[-2:] == (ord("b"), 2)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"instruction": "a", "output": "b"', "is no JSON: Expecting ',' delimiter, at character 35"),
        ("instruction: a", "is no JSON"),
        ('["a", "b"]', "is no JSON object in braces"),
        ('{"instruction": "a"}', "has no 'output'; it has instruction; a line is instruction and output, or messages"),
        ('{"instruction": "a", "ouptut": "b"}', "has 'ouptut', did you mean 'output'?"),
        ('{"prompt": "a", "completion": "b"}', "has no 'instruction'; it has prompt, completion; a line is"),
        ('{"instruction": "a", "output": ""}', "'output' is empty"),
        ('{"instruction": "a", "output": " \\n"}', "'output' is empty"),
        ('{"instruction": "", "output": "b"}', "'instruction' is empty"),
        ('{"instruction": "a", "output": 7}', "'output' is no text but 7"),
        ('{"instruction": "a", "output": "b", "inptu": "c"}', "has 'inptu', did you mean 'input'"),
        ('{"text": ""}', "'text' is empty"),
        ('{"messages": []}', "'messages' is no list of messages"),
        ('{"messages": ["a"]}', "message 1: is no JSON object with role and content"),
        ('{"messages": [{"role": "user"}]}', "message 1: has no 'content'"),
        ('{"messages": [{"role": "usr", "content": "a"}]}', "message 1: no role 'usr', did you mean 'user'?"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "ends without an answer of the assistant"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "begins with an answer of the assistant"),
        ('{"text": "cut: \\ud83d"}', "'text' has half of a character"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
            "message 2: 'content' is empty",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "my.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_lines(file, TOKENIZER)
    assert str(error.value).startswith(f"{file}, line 3")
    assert said in str(error.value)


def test_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_bytes(b'{"text": "\xff"}')
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    for name, said in [("my.jsonl", "no UTF-8 text, at byte 10"), ("empty.jsonl", "has no lines")]:
        with pytest.raises(UserError, match=said):
            read_lines(tmp_path / name, TOKENIZER)
    with pytest.raises(UserError, match=r"my\.json: no such file, did you mean '.*my\.jsonl'"):
        read_lines(tmp_path / "my.json", TOKENIZER)


def test_separators_within_a_text_are_no_new_lines(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text('\ufeff{"text": "a\u2028b"}\r\n', encoding="utf-8", newline="")
    (line,) = read_lines(tmp_path / "my.jsonl", TOKENIZER)
    assert line.turns[0].answer == "a\u2028b"


def test_a_tokenizer_without_a_chat_template() -> None:
    plain = small_models.tokenizer()
    plain.chat_template = None
    with pytest.raises(UserError, match="here: the model's tokenizer has no chat template"):
        read_line(json.dumps({"messages": CHAT}), plain, place="here")


def test_a_template_that_refuses_and_one_that_contradicts_itself() -> None:
    strict = small_models.tokenizer()
    strict.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(UserError, match="refuses these messages: no system here"):
        read_line(json.dumps({"messages": CHAT}), strict, place="here")
    strict.chat_template = "{% if add_generation_prompt %}a{% else %}b{% endif %}"
    with pytest.raises(UserError, match="renders an answer otherwise than it asks for it"):
        read_line(json.dumps({"messages": CHAT}), strict, place="here")


def test_the_small_tokenizer_loses_nothing() -> None:
    text = "Grüße, 日本\n\n### Input:\n<x> Reverse the letters: abc"
    assert TOKENIZER.decode(token_ids(text, TOKENIZER)) == text
