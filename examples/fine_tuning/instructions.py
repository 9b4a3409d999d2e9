"""Reads instructions for a language model from JSON lines, each of which is one of

    {"instruction": ..., "input": ..., "output": ...}     without "input" where there is none
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"text": ...}

The loss is that of outputs, of the assistant's turns, or of the whole text. A text beside an instruction and its output
is the two once more, as Alpaca's data have it, and is not read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from library.errors import UserError, did_you_mean, is_utf8, nearest_path, why_not

ROLES = ("system", "user", "assistant")

Message = dict[str, str]
Tokenizer = Any  # transformers has no usable types


class Turn(NamedTuple):
    """Texts as the model reads them: what it is given, and what it is to write."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Line:
    """`place`: "file.jsonl, line 3". `asked`: what is compared to find near-equal lines. `chat`: rendered by a chat
    template, which sets the first token itself."""

    place: str
    asked: str
    turns: tuple[Turn, ...]
    chat: bool = False


def read_lines(path: Path, tokenizer: Tokenizer, *, as_chat: bool = False) -> list[Line]:
    """All lines of a file. `as_chat`: instructions are rendered by the tokenizer's chat template, too.

    Raises UserError with the file, the line and the nearest right name.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no UTF-8 text, at byte {error.start}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{nearest_path(path)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {why_not(error)}") from None
    numbered = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise UserError(f"{path}: has no lines")
    return [read_line(line, tokenizer, place=place, as_chat=as_chat) for place, line in numbered]


def read_line(line: str, tokenizer: Tokenizer, *, place: str, as_chat: bool = False) -> Line:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: is no JSON: {error.msg}, at character {error.pos + 1}") from None
    if not isinstance(item, dict):
        raise UserError(f"{place}: is no JSON object in braces")
    if "messages" in item:
        return _of_messages(item["messages"], tokenizer, place)
    if "text" in item and not {"instruction", "output"} <= item.keys():
        text = _text(item, "text", place)
        return Line(place, text, (Turn("", text),))
    instruction, output = _text(item, "instruction", place), _text(item, "output", place)
    for key in item.keys() - {"instruction", "output", "input"}:
        if hint := did_you_mean(key, ("input",)):
            raise UserError(f"{place}: has '{key}'{hint}")
    given = _text(item, "input", place) if item.get("input") else ""
    asked = f"{instruction}\n\n{given}".strip()
    if as_chat:
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
        return _of_messages(messages, tokenizer, place)
    return Line(place, asked, (Turn(instruct(instruction, given), output),))


def instruct(instruction: str, given: str = "") -> str:
    """The prompt of an instruction, in the words of Alpaca's data."""
    given = f"### Input:\n{given}\n\n" if given else ""
    return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"


def _text(item: dict[str, object], key: str, place: str) -> str:
    if key not in item:
        found = f"it has {', '.join(item) or 'nothing'}; a line is instruction and output, or messages, or text"
        near = (f"has '{other}'{hint}" for other in item if (hint := did_you_mean(other, (key,))))
        raise UserError(f"{place}: {next(near, f'has no {key!r}; {found}')}")
    value = item[key]
    if not isinstance(value, str):
        raise UserError(f"{place}: '{key}' is no text but {json.dumps(value)[:40]}")
    if not value.strip():
        raise UserError(f"{place}: '{key}' is empty")
    if not is_utf8(value):
        raise UserError(f"{place}: '{key}' has half of a character, such as \\ud83d without its other half")
    return value


def _of_messages(messages: object, tokenizer: Tokenizer, place: str) -> Line:
    """A turn for each of the assistant's answers, with everything before it as its prompt."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: 'messages' is no list of messages")
    for number, message in enumerate(messages, 1):
        where = f"{place}, message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{where}: is no JSON object with role and content")
        role, _ = _text(message, "role", where), _text(message, "content", where)
        if role not in ROLES:
            raise UserError(
                f"{where}: no role '{role}'{did_you_mean(role, ROLES) or '; there are ' + ', '.join(ROLES)}"
            )
    if messages[0]["role"] == "assistant":
        raise UserError(f"{place}: begins with an answer of the assistant, to nothing")
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{place}: ends without an answer of the assistant")
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    turns = tuple(_turn(messages[: number + 1], tokenizer, place) for number in answers)
    asked = "\n".join(message["content"] for message in messages if message["role"] != "assistant")
    return Line(place, asked, turns, chat=True)


def _turn(messages: Sequence[Message], tokenizer: Tokenizer, place: str) -> Turn:
    prompt = chat_prompt(messages[:-1], tokenizer, place)
    whole = _rendered(messages, tokenizer, place, add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise UserError(f"{place}: the tokenizer's chat template renders an answer otherwise than it asks for it")
    return Turn(prompt, whole[len(prompt) :].rstrip("\n"))


def chat_prompt(messages: Sequence[Message], tokenizer: Tokenizer, place: str) -> str:
    return _rendered(messages, tokenizer, place, add_generation_prompt=True)


def _rendered(messages: Sequence[Message], tokenizer: Tokenizer, place: str, *, add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise UserError(f"{place}: the model's tokenizer has no chat template; give instructions, or a chat model")
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise UserError(f"{place}: the tokenizer's chat template refuses these messages: {error}") from None
    return text
