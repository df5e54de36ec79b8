"""The models whose input contract is known, by short name.

The table is data, ``data/models.json``: templates, special tokens, attention, pooling and length
limit as the models' cards and code have them, and the instructions of MTEB's tasks under MTEB's
names. No contract has a default task, because no card names one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from lowmem import data
from lowmem.artifact.contract import Contract, parse_contract


@dataclass(frozen=True)
class KnownModel:
    """One row of the table.

    Attributes:
        name: Short name, as ``--contract`` takes it.
        hub_id: ``owner/name`` on the Hugging Face hub.
        revisions: Commits of that repository that are known to be this model.
        contract: The input contract.
    """

    name: str
    hub_id: str
    revisions: frozenset[str]
    contract: Contract


@cache
def known_models() -> Mapping[str, KnownModel]:
    """The table, by name."""
    table = data.load_json("models.json")
    models = {}
    for name, row in table["models"].items():
        contract = {**row["contract"], "tasks": {**table["tasks"], **row["tasks"]}}
        models[name] = KnownModel(
            name,
            row["hub_id"],
            frozenset(row["revisions"]),
            parse_contract(contract, f"models.json, {name}"),
        )
    return MappingProxyType(models)
