"""The configuration of an onnxruntime-genai model folder: the models it names, and edits of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

CONFIG = "genai_config.json"

Key = tuple[str | int, ...]
"""Where a value is: the names and indices that lead to it."""

Json: TypeAlias = Any
"""What `json` decodes to."""


@dataclass(frozen=True)
class Part:
    """One ONNX model that the configuration names.

    Attributes:
        name: As in "decoder", or "decoder.pipeline.0.context".
        at: Where the object is that names it.
        filename: The model, relative to the folder.
        options_at: Where its session options are: its own, or else those of the decoder.
        providers: The execution providers that they ask for, in lower case; none for the CPU.
    """

    name: str
    at: Key
    filename: str
    options_at: Key
    providers: tuple[str, ...]


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """The configuration of a model folder, as text and decoded.

    Raises:
        FileNotFoundError: If the folder has none.
        ValueError: If it is not one of onnxruntime-genai.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}, so it is not a model folder of onnxruntime-genai; for a "
            "model without one use `qmoe_plugin retarget`"
        )
    text = path.read_text(encoding="utf-8")
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{path} has no object 'model'; is it of onnxruntime-genai?")
    return text, config


def write_config(config: dict[str, Any]) -> str:
    """The text of a configuration, laid out as the model builder does."""
    return json.dumps(config, indent=4, ensure_ascii=False)


def parts(config: dict[str, Any]) -> list[Part]:
    """The models that a configuration names.

    Raises:
        ValueError: If there is none.
    """
    found = list(_parts(config, config["model"], ("model",)))
    if not found:
        raise ValueError(f"{CONFIG} names no ONNX model ('filename')")
    return found


def _parts(config: dict[str, Any], value: object, at: Key) -> Iterator[Part]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _parts(config, item, (*at, index))
    if not isinstance(value, dict):
        return
    filename = value.get("filename")
    if isinstance(filename, str) and filename.endswith(".onnx"):
        own = isinstance(value.get("session_options"), dict)
        options_at: Key = (*(at if own else ("model", "decoder")), "session_options")
        yield Part(
            ".".join(map(str, at[1:])), at, filename, options_at, _providers(config, options_at)
        )
    for key, item in value.items():
        yield from _parts(config, item, (*at, key))


def _providers(config: dict[str, Any], options_at: Key) -> tuple[str, ...]:
    """Names of the execution providers that session options ask for."""
    asked = get(config, (*options_at, "provider_options"), [])
    return tuple(name.lower() for entry in asked for name in entry)


def get(config: Json, at: Key, default: object = None) -> Json:
    """The value there, or the default if there is none."""
    for key in at:
        try:
            config = config[key]
        except (KeyError, IndexError, TypeError):
            return default
    return config


def head_size(folder: Path) -> int | None:
    """The head size of the decoder, which its states leave open; None where nothing says it."""
    if not (folder / CONFIG).is_file():
        return None
    size = get(read_config(folder)[1], ("model", "decoder", "head_size"))
    return size if isinstance(size, int) else None


@dataclass(frozen=True)
class Edit:
    """A value that was put into a configuration.

    Attributes:
        at: Where.
        new: The value.
        former: [the value before], or [] if there was none.
    """

    at: Key
    new: object
    former: tuple[object, ...]


_ABSENT = object()


def put(config: dict[str, Any], at: Key, value: object) -> Edit | None:
    """Puts a value there, making the objects that lead to it; None if it was there before."""
    former = get(config, at, _ABSENT)
    if former == value:
        return None
    holder: Json = config
    for key in at[:-1]:
        holder = holder.setdefault(key, {}) if isinstance(holder, dict) else holder[key]
    holder[at[-1]] = value
    return Edit(at, value, () if former is _ABSENT else (former,))


def revert(config: dict[str, Any], edit: Edit) -> None:
    """Undoes `put`, unless somebody put another value there meanwhile."""
    if get(config, edit.at, _ABSENT) != edit.new:
        return
    holder = get(config, edit.at[:-1])
    if edit.former:
        holder[edit.at[-1]] = edit.former[0]
    else:
        del holder[edit.at[-1]]
