"""The ratios in a JSON file of pytest-benchmark, as a Markdown table.

python -m benchmarks.table results.json
"""

import json
import sys
from pathlib import Path


def table(document: dict) -> str:
    lines = ["| case | vs eager | vs torch.compile | ns an element |", "| --- | --- | --- | --- |"]
    for each in document["benchmarks"]:
        info = each["extra_info"]
        cells = [
            f"{info[peer]['median']:.1f}× ± {100 * info[peer]['spread']:.0f}%" if peer in info else "-"
            for peer in ("eager", "compiled")
        ]
        lines.append(f"| {each['name'].removeprefix('bench_')} | {' | '.join(cells)} | {info['ns_per_element']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
