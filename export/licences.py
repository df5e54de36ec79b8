"""Licences that an export asks to be accepted.

The rule is a list of those that permit every use, commercial use included. All others are asked
about: what a licence of one's own name forbids cannot be told from its name. A source that names
no licence is not asked about; the command line says so.
"""

from __future__ import annotations

from collections.abc import Callable

from lowmem.errors import InputError

Accepts = Callable[[str], bool]
"""Whether a licence, by the name that its source gives it, is accepted."""

# As the hub's model cards spell them.
_PERMISSIVE = frozenset(
    """afl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
    ecl-2.0 isc mit ms-pl ncsa odc-by pddl postgresql unlicense wtfpl zlib""".split()
)


def accepts_none(licence: str) -> bool:
    """Accepts no licence that has to be asked about."""
    return False


def check(licence: str | None, accepts: Accepts, source: str) -> None:
    """Checks that what a source's licence may forbid has been accepted.

    Args:
        licence: The licence, several with commas between, or None.
        accepts: Asked about each that is not known to permit every use.
        source: The source's name.

    Raises:
        InputError: One of them is not accepted; all such are named.
    """
    names = [] if licence is None else licence.split(", ")
    asked = [name for name in names if name.casefold() not in _PERMISSIVE]
    refused = [name for name in asked if not accepts(name)]
    if refused:
        options = " ".join(f"--accept-licence {name!r}" for name in refused)
        raise InputError(
            f"the licence of {source}, {', '.join(map(repr, refused))}, may not permit every use: "
            f"read it, and accept it with {options}"
        )
