"""Which layer finds the domains, and what do the template's own tokens in the mean do? Clusters beside true labels.

    python benchmarks/discovered_labels.py rows runs/discover/demo --train 100 --test 20
    python benchmarks/discovered_layers.py runs/discover/demo [--max-length 256] [--json]

Reads a folder of rows with true labels as `loramix experts discover` does, once for each layer (a quarter of the depth,
half, all of it), and once more at half with the template's opening tokens in the mean; prints the number of clusters
that silhouette chooses and how they agree with the labels, then the same with the true number given.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from loramix.cli.output import quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="as --data of loramix experts discover, with true labels")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    quiet_libraries()
    from loramix import load_base, load_tokenizer
    from loramix.lifecycle.clustering import cluster
    from loramix.lifecycle.discover_agreement import agreement
    from loramix.lifecycle.discover_data import read_rows
    from loramix.lifecycle.embedding import depth, opening_ids, prompt_ids, prompt_states

    found = read_rows(arguments.data)
    records = [*found.train, *found.test]
    labels = [record.domain for record in records]
    base, tokenizer = load_base(), load_tokenizer()
    prompts, opening = prompt_ids(tokenizer, records, arguments.max_length), opening_ids(tokenizer)
    layers = depth(base)
    rows: list[dict[str, Any]] = []
    for layer, left_out in ((layers // 4, opening), (layers // 2, opening), (layers, opening), (layers // 2, ())):
        how: dict[str, Any] = {"layer": layer, "opening": left_out, "pad_token_id": int(tokenizer.pad_token_id)}
        vectors_NH = prompt_states(base, prompts, **how)
        for k in (None, len(set(labels))):
            clusters = cluster(vectors_NH, fit_rows=len(found.train), k=k)
            agreed = agreement([str(one) for one in clusters.of], labels)
            assert agreed is not None
            row = {
                "layer": layer,
                "opening": "left out" if left_out else "in the mean",
                "k": clusters.k,
                "chosen by": "silhouette" if k is None else "hand",
                "silhouette": clusters.silhouettes[clusters.k],
                "purity": agreed.purity,
                "nmi": agreed.normalised_mutual_information,
                "ari": agreed.adjusted_rand_index,
            }
            rows.append(row)
            print(json.dumps(row), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
