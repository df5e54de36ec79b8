"""What a source's own files make of it in sentence-transformers.

Nothing that is exported follows these files: the contract decides. What they name that is not
computed is refused, and where they disagree with the contract the export says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem.artifact import strict_json
from lowmem.artifact.sentence_transformers_files import (
    MODULES,
    POOLING,
    PROMPTS,
    SETTINGS,
    UNEQUAL_MEAN,
)
from lowmem.errors import BundleError, InputError

ADAPTER = "adapter_config.json"
_COMPUTED = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class Stated:
    """How sentence-transformers would use a source, as far as its files say.

    Attributes:
        pooling_modes: What it pools by, in sentence-transformers' words: ``lasttoken``, ``mean``,
            ``cls`` and others; none where no file says so.
        pools_prompts: Whether what it pools takes in the prompt.
        prompts: Name to what is put before a text; those that are not empty.
    """

    pooling_modes: tuple[str, ...] = ()
    pools_prompts: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_directory(cls, directory: Path) -> Stated:
        """Reads a model directory's files, those that are there.

        Raises:
            BundleError: A file is damaged.
        """
        pooling = object_if_there(directory / POOLING)
        prompts = object_if_there(directory / PROMPTS).get("prompts")
        return cls(
            pooling_modes(pooling),
            # Its default where there is a pooling.
            bool(pooling) and pooling.get("include_prompt", True) is not False,
            {name: text for name, text in prompts.items() if isinstance(text, str) and text}
            if isinstance(prompts, dict)
            else {},
        )


def refuse_other_vectors(directory: Path) -> None:
    """Checks that a directory's small files name nothing that is not computed.

    Raises:
        InputError: An adapter lies beside the weights, which transformers would apply.
        BundleError: A module or a change of the text is not computed, or a file is damaged.
    """
    refuse_adapter((path.name for path in directory.iterdir()), str(directory))
    if object_if_there(directory / SETTINGS).get("do_lower_case"):
        raise BundleError(
            f"texts are lower-cased before this model, which is not computed ({SETTINGS} in "
            f"{directory})"
        )
    path = directory / MODULES
    if not path.is_file():
        return
    modules = strict_json.read(path)
    if not isinstance(modules, list):
        raise BundleError(f"{path} must hold an array, got {strict_json.type_name(modules)}")
    named = [module.get("type") if isinstance(module, dict) else None for module in modules]
    kinds = [kind for kind in named if isinstance(kind, str)]
    if len(kinds) < len(named):
        raise BundleError(f"each module must have its type as a string ({path})")
    # Releases of sentence-transformers differ in where a module stands, not in what it is called.
    others = [
        kind for kind in kinds if kind.rpartition(".")[2] not in _COMPUTED and kind != UNEQUAL_MEAN
    ]
    if others:
        raise BundleError(
            f"lowmem computes {', '.join(_COMPUTED[:-1])} and {_COMPUTED[-1]} only, got the module "
            f"{', '.join(map(repr, others))} ({path})"
        )


def refuse_adapter(files: Iterable[str], place: str) -> None:
    """Checks that no adapter is among the files of a source.

    Raises:
        InputError: There is one.
    """
    if ADAPTER in files:
        raise InputError(
            f"a source must hold its weights alone, and {place} has an {ADAPTER}, which "
            "transformers would apply to them: merge the adapter into the weights, or remove it"
        )


def pooling_modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the configuration of a pooling says, in sentence-transformers' words.

    Newer files name the modes under ``pooling_mode``; older ones have a flag for each.

    Args:
        config: The object in ``1_Pooling/config.json``.
    """
    if "pooling_mode" in config:
        named = config["pooling_mode"]
        return tuple(map(str, named)) if isinstance(named, list) else (str(named),)
    flags = (re.fullmatch(r"pooling_mode_(\w+?)(?:_tokens?)?", key) for key in config)
    return tuple(flag[1] for flag in flags if flag and config[flag[0]] is True)


def object_if_there(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no file.

    Raises:
        BundleError: It is damaged.
    """
    return strict_json.read_object(path) if path.is_file() else {}
