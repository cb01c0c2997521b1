"""Flags from dataclasses: a field of a command's options is a flag, and stands nowhere else."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, get_args, get_origin

import typer

from hf_lowrank.options import flag_name

__all__ = ["with_flags"]


def with_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a command's parameter `options`, a dataclass, by the flags that its fields describe."""
    signature = inspect.signature(command)
    options_class: Any = signature.parameters["options"].annotation
    flags = {field.name: field for field in fields(options_class) if "help" in field.metadata}

    def read_flags(**values: Any) -> Any:
        given = {name: _value(field, values.pop(name)) for name, field in flags.items()}
        return command(**values, options=options_class(**given))

    others = [parameter for name, parameter in signature.parameters.items() if name != "options"]
    parameters = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in others]
    read_flags.__name__, read_flags.__doc__ = command.__name__, command.__doc__
    read_flags.__signature__ = inspect.Signature([*parameters, *map(_parameter, flags.values())])  # type: ignore[attr-defined]
    return read_flags


def _parameter(field: Field[Any]) -> inspect.Parameter:
    """What typer reads a flag from."""
    kind: Any = field.type
    names, default = field.metadata.get("flags", ()), field.default
    if kind is bool:
        # without a --no-... form
        names = names or (flag_name(field),)
    elif "parse" in field.metadata and default is MISSING:
        kind = str
    elif "parse" in field.metadata:
        kind, default = str | None, None if default is None else str(default)
    elif get_origin(kind) is tuple:
        kind, default = list[get_args(kind)[0]] | None, None  # type: ignore[misc]
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[kind, typer.Option(*names, help=field.metadata["help"])],
    )


def _value(field: Field[Any], value: Any) -> Any:
    """A field's value from what typer has read."""
    if value is None:
        return field.default
    if isinstance(value, list):
        return tuple(value)
    return field.metadata["parse"](flag_name(field), value) if "parse" in field.metadata else value
