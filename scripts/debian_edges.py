"""Make a snapshot of Debian's package graph from package indexes.

    python scripts/debian_edges.py Packages.xz [more indexes ...] --output examples/debian/2025-08-09.parquet

An index is a `Packages` file of an archive (`dists/<suite>/main/binary-amd64/Packages.xz`): plain, .gz, .xz or .bz2.
The result is Parquet with the columns lhs, rel, rhs, one row an edge, sorted. Needs pyarrow and nothing else.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import lzma
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
# A pre-dependency is a dependency with an order of installation.
LINKS = {
    "Depends": "depends",
    "Pre-Depends": "depends",
    "Recommends": "recommends",
    "Suggests": "suggests",
    "Enhances": "enhances",
}
Edge = tuple[str, str, str]


def stanzas(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield the fields of each package of an index; continued lines are joined by a space."""
    fields: dict[str, str] = {}
    name = ""
    for line in lines:
        line = line.rstrip("\n")
        if not line.strip():
            if fields:
                yield fields
            fields, name = {}, ""
        elif line[0] in " \t":
            if name:
                fields[name] += " " + line.strip()
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    if fields:
        yield fields


def targets(relationship: str) -> list[str]:
    """Return the packages named by a relationship field; of alternatives (`a | b`) each one, without versions."""
    named = (re.match(r"[a-z0-9][a-z0-9.+-]*", part.strip()) for part in re.split(r"[,|]", relationship))
    return [match[0] for match in named if match]


def tags(field: str) -> list[str]:
    """Return the tags of a Tag field, `facet::{a,b}` written out as `facet::a` and `facet::b`."""
    found = []
    for part in re.findall(r"[^,\s{}]+(?:\{[^}]*\})?", field):
        prefix, brace, inner = part.partition("{")
        found += [prefix + word.strip() for word in inner.rstrip("}").split(",")] if brace else [part]
    return found


def edges(packages: Iterable[dict[str, str]]) -> list[Edge]:
    """Return the distinct edges of packages, sorted. Links to itself or to packages no index has are left out."""
    listed = [fields for fields in packages if "Package" in fields]
    known = {fields["Package"] for fields in listed}
    found: set[Edge] = set()
    for fields in listed:
        package = fields["Package"]
        for field, relation in LINKS.items():
            linked = targets(fields.get(field, ""))
            found.update((package, relation, target) for target in linked if target in known and target != package)
        # The name without the address, which is personal and changes more often.
        maintainer = fields.get("Maintainer", "").partition("<")[0].strip().strip('"')
        if maintainer:
            found.add((package, "maintained_by", maintainer))
        if fields.get("Section"):
            found.add((package, "in_section", fields["Section"].rpartition("/")[2]))
        found.update((package, "tagged", tag) for tag in tags(fields.get("Tag", "")))
    return sorted(found)


def write(rows: list[Edge], path: str) -> None:
    """Write edges as Parquet."""
    columns = list(zip(*rows, strict=True)) if rows else [[], [], []]
    table = pa.table(
        {name: pa.array(list(column), pa.string()) for name, column in zip(("lhs", "rel", "rhs"), columns, strict=True)}
    )
    pq.write_table(table, path, compression="zstd", compression_level=19)


def main(arguments: list[str] | None = None) -> int:
    """Read the indexes, write the snapshot, and say how many edges it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("indexes", nargs="+", help="Packages files: plain, .gz, .xz or .bz2")
    parser.add_argument("--output", required=True, help="the Parquet file to write")
    told = parser.parse_args(arguments)
    packages: list[dict[str, str]] = []
    for index in told.indexes:
        try:
            with OPENERS.get(Path(index).suffix, open)(index, "rt", encoding="utf-8") as file:
                packages.extend(stanzas(file))
        except OSError as error:
            print(f"{index}: cannot be read ({error}); give a Packages file", file=sys.stderr)
            return 2
    rows = edges(packages)
    if not rows:
        print(f"{', '.join(told.indexes)}: no package found; give a Packages file", file=sys.stderr)
        return 2
    write(rows, told.output)
    print(f"{told.output}: {len(rows):,} edges of {len({row[0] for row in rows}):,} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
