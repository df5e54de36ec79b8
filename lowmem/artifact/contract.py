"""The input contract: what turns a text into the ids that a model was trained on, and back.

It is part of the artifact. A lost EOS, a wrong pooling or a wrong template gives a vector that
looks like any other, so nothing here is ever guessed: the contract is written down at export and
every reader of the bundle follows it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lowmem.artifact import strict_json
from lowmem.errors import BundleError, InputError

POOLINGS = ("lasttoken", "mean", "latent_attention")
_TEXT = "{text}"
_TASK = "{task}"


@dataclass(frozen=True)
class Contract:
    r"""How texts become token ids, and hidden states become one vector.

    ids = [``bos_token_id``] + ids(prompt + text) + [``eos_token_id``]; a null id is left out. The
    prompt is a template up to ``{text}``, which always stands last in it.

    Attributes:
        query_template: Such as ``Instruct: {task}\nQuery: {text}``.
        document_template: Such as ``{text}``.
        tasks: Short name of a task to its instruction.
        default_task: A name in ``tasks``, for queries that come without a task, or None.
        bos_token_id: First id of every text, or None.
        eos_token_id: Last id of every text, also after truncation, or None.
        is_causal: Whether a token attends only to itself and earlier ones.
        pooling: ``lasttoken``, ``mean`` over the tokens behind the instruction, or
            ``latent_attention``: NV-Embed's layer of that name, then such a mean.
        max_seq_length: Most tokens of one text, prompt and special tokens included.
        normalize_embeddings: Whether vectors have unit length.
    """

    query_template: str
    document_template: str
    bos_token_id: int | None
    eos_token_id: int | None
    is_causal: bool
    pooling: str
    max_seq_length: int
    normalize_embeddings: bool
    tasks: dict[str, str] = field(default_factory=dict)
    default_task: str | None = None

    @property
    def special_tokens(self) -> int:
        """How many ids are added to those of the text: 0, 1 or 2."""
        return (self.bos_token_id is not None) + (self.eos_token_id is not None)

    @property
    def has_prompts(self) -> bool:
        """Whether anything is put before queries or documents."""
        return {self.query_template, self.document_template} != {"{text}"}

    @property
    def takes_tasks(self) -> bool:
        """Whether a query has a place for an instruction."""
        return _TASK in self.query_template

    def prompt(self, input_type: str, task: str | None = None) -> str:
        """Returns what is put before a text.

        Args:
            input_type: ``query`` or ``document``.
            task: A name in ``tasks``, or an instruction as it stands. None means the contract's
                default; the empty string means none, and so what stands before a document.

        Raises:
            InputError: The input type is unknown, a task is needed and there is no default, it is
                a name but for its capitals, or there is no place for one.
        """
        if input_type not in ("query", "document"):
            raise InputError(f"input_type must be query or document, got {input_type!r}")
        template = self.query_template if input_type == "query" else self.document_template
        before = template.removesuffix(_TEXT)
        if _TASK not in before:
            if task:
                raise InputError(
                    f"by its contract this model takes a {input_type} without a task, got {task!r}"
                )
            return before
        if task is None:
            task = self.default_task
        if task is None:
            known = ", ".join(sorted(self.tasks)) or "none"
            raise InputError(
                "a query needs a task for this model, and its contract has no default: "
                f"give an instruction, or one of its task names (known: {known})"
            )
        if task not in self.tasks:
            for name in self.tasks:
                if name.casefold() == task.strip().casefold():
                    raise InputError(f"the contract has no task {task!r}: its name is {name!r}")
        instruction = self.tasks.get(task, task)
        if instruction:
            return before.replace(_TASK, instruction)
        bare = self.document_template.removesuffix(_TEXT)
        return "" if _TASK in bare else bare

    def to_json(self) -> dict[str, Any]:
        """The object that stands in the manifest, and that ``--contract FILE`` takes."""
        return asdict(self)

    def bounded(self, longest_sequence: int) -> Contract:
        """The same contract with ``max_seq_length`` no longer than the model's own limit."""
        if self.max_seq_length <= longest_sequence:
            return self
        return Contract(**{**asdict(self), "max_seq_length": longest_sequence})


def parse_contract(value: Any, place: str) -> Contract:
    """Reads a contract from its JSON object.

    Args:
        value: The parsed object.
        place: Where it stands, for messages.

    Raises:
        BundleError: A key is missing, unknown, or holds a value outside its rule; all problems
            are listed at once.
    """
    if not isinstance(value, dict):
        raise BundleError(f"a contract must be a JSON object, got {type(value).__name__} ({place})")
    known = {item.name for item in fields(Contract)}
    problems = [f"unknown key {key!r}" for key in sorted(set(value) - known)]
    problems += [
        f"missing key {key!r}" for key in sorted(known - {"tasks", "default_task"} - set(value))
    ]
    if not problems:
        problems = _problems(value)
    if problems:
        raise BundleError(f"the contract in {place} is not valid: " + "; ".join(problems))
    return Contract(**value)


def read_contract(path: Path) -> Contract:
    """Reads a contract from a JSON file.

    Raises:
        BundleError: The file is missing, is not JSON, or breaks a rule of the contract.
    """
    return parse_contract(strict_json.read_object(path), str(path))


def _problems(value: dict[str, Any]) -> list[str]:
    problems = []
    for key in ("query_template", "document_template"):
        template = value[key]
        if not isinstance(template, str) or not template.endswith(_TEXT):
            problems.append(f"{key} must be a string that ends with {_TEXT}, got {template!r}")
            continue
        rest = template.removesuffix(_TEXT).replace(_TASK, "", 1)
        if "{" in rest or "}" in rest:
            problems.append(f"{key} may name {_TASK} and {_TEXT} once each, got {template!r}")
    for key in ("bos_token_id", "eos_token_id"):
        token = value[key]
        if token is not None and (type(token) is not int or not 0 <= token < 2**31):
            problems.append(f"{key} must be a token id or null, got {token!r}")
    for key in ("is_causal", "normalize_embeddings"):
        if type(value[key]) is not bool:
            problems.append(f"{key} must be true or false, got {value[key]!r}")
    if value["pooling"] not in POOLINGS:
        problems.append(f"pooling must be one of {', '.join(POOLINGS)}, got {value['pooling']!r}")
    elif value["pooling"] == "latent_attention" and value["is_causal"]:
        problems.append("pooling by latent_attention needs is_causal=false")
    length = value["max_seq_length"]
    if type(length) is not int or not 4 <= length < 2**31:
        problems.append(f"max_seq_length must be an integer of at least 4, got {length!r}")
    tasks = value.get("tasks", {})
    if not isinstance(tasks, dict) or not all(isinstance(text, str) for text in tasks.values()):
        problems.append("tasks must map names to instructions")
        return problems
    if value.get("default_task") is not None and value["default_task"] not in list(tasks):
        problems.append(f"default_task must be a name in tasks, got {value['default_task']!r}")
    problems += [
        f"a task must not be named {name!r}, which is the name of another prompt"
        for name in ("query", "document")
        if name in tasks
    ]
    return problems
