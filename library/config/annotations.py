"""Whether a value fits an annotation that is known only as text, such as "float | None" or "Sequence[int]"."""

from __future__ import annotations

import ast

_NUMBERS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
_LISTS = ("Sequence", "Iterable", "list", "tuple", "List", "Tuple")


def fit(value: object, text: str, annotation: str) -> tuple[object] | None:
    """The value in the annotated type, as a 1-tuple, or None if it does not fit.

    `value` is the Python value of `text`. An annotation of an unsupported form fits everything. 1 and 0 fit bool; a
    whole number fits float; any text fits str.
    """
    if not annotation:
        return (value,)
    fitted: tuple[object] | None = None
    for term in _terms(annotation):
        fitted = fitted or _fit_term(value, text, term)
    return fitted


def describe(annotation: str) -> str:
    """The annotation in words: "a number or none"."""
    return " or ".join(_describe_term(term) for term in _terms(annotation))


def _terms(annotation: str) -> list[ast.expr]:
    """The members of a union; str comes last, because every text fits it."""
    terms = _split(ast.parse(annotation, mode="eval").body)
    return sorted(terms, key=lambda term: isinstance(term, ast.Name) and term.id == "str")


def _split(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        return [*_split(node.left), *_split(node.right)]
    if isinstance(node, ast.Subscript) and _name(node.value) == "Optional":
        return [*_split(node.slice), ast.Constant(None)]
    return [node]


def _fit_term(value: object, text: str, term: ast.expr) -> tuple[object] | None:
    if isinstance(term, ast.Constant) and term.value is None:
        return (None,) if value is None else None
    if isinstance(term, ast.Subscript) and _name(term.value) == "Literal":
        return next(((choice,) for choice in _choices(term) if value == choice or text == str(choice)), None)
    if isinstance(term, ast.Subscript) and _name(term.value) in _LISTS:
        return _fit_list(value, term)
    kind = _name(term)
    if kind == "bool":
        return (bool(value),) if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)) else None
    if kind == "int":
        return (value,) if isinstance(value, int) and not isinstance(value, bool) else None
    if kind == "float":
        return (float(value),) if isinstance(value, int | float) and not isinstance(value, bool) else None
    if kind == "str":
        return (value,) if isinstance(value, str) else (text,)
    return (value,)


def _fit_list(value: object, term: ast.Subscript) -> tuple[object] | None:
    if not isinstance(value, list | tuple):
        return None
    items = term.slice.elts if isinstance(term.slice, ast.Tuple) else [term.slice]
    fixed = _name(term.value).lower() == "tuple" and not isinstance(items[-1], ast.Constant)
    if fixed and len(items) != len(value):
        return None
    fitted = [fit(item, str(item), ast.unparse(items[index if fixed else 0])) for index, item in enumerate(value)]
    return None if None in fitted else (tuple(item[0] for item in fitted if item is not None),)


def _describe_term(term: ast.expr) -> str:
    if isinstance(term, ast.Constant) and term.value is None:
        return "none"
    if isinstance(term, ast.Subscript) and _name(term.value) == "Literal":
        return f"one of {', '.join(map(str, _choices(term)))}"
    if isinstance(term, ast.Subscript) and _name(term.value) in _LISTS:
        items = term.slice.elts if isinstance(term.slice, ast.Tuple) else [term.slice]
        fixed = _name(term.value).lower() == "tuple" and not isinstance(items[-1], ast.Constant)
        count = f"{len(items)} values" if fixed else "values"
        return f"{count} with commas between them, each {describe(ast.unparse(items[0]))}"
    return _NUMBERS.get(_name(term), ast.unparse(term))


def _choices(term: ast.Subscript) -> list[object]:
    nodes = term.slice.elts if isinstance(term.slice, ast.Tuple) else [term.slice]
    return [node.value for node in nodes if isinstance(node, ast.Constant)]


def _name(node: ast.expr) -> str:
    """The last part of a dotted name."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
