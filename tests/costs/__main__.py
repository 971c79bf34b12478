"""`python -m costs` (in tests/): prints what workflows cost, as JSON."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import sys

from costs.scenarios import SCENARIOS, costs
from perdure import embedded
from simulation.play import own_database, prepare

_SETTINGS = {"autovacuum": "off", "full_page_writes": "off", "checkpoint_timeout": "1h"}


def main() -> None:
    """Count all of them."""
    logging.disable()
    gc.disable()  # what dead processes have left must not be unwound
    with embedded.temporary(_SETTINGS) as cluster:
        asyncio.run(prepare(cluster.url))
        url = own_database(cluster.url)  # of all of them: sessions are used again
        counted = {name: costs(scenario, url) for name, scenario in SCENARIOS.items()}
    print(json.dumps(counted, indent=1))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
