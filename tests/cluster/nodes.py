"""A Ray cluster of two nodes on this machine, by Ray's own means of testing; it does what stdin says, line by line.

`worker` adds a node to the head, `gcs` starts the head's GCS again after it was killed. Each is answered by one line of
JSON: the cluster's address at first, then the raylet's process id, or null. It ends with stdin.
"""

import json
import sys
from typing import Any

from ray.cluster_utils import Cluster

from tests.workers import WORKERS

CPUS = WORKERS
"""Logical ones a node: room for one replica of the demo."""


def main() -> None:
    """Obey until stdin ends."""
    port = int(sys.argv[1])  # the same one after a restart
    dashboard = {"include_dashboard": True, "dashboard_port": int(sys.argv[2])}
    head_args = {"num_cpus": CPUS, "gcs_server_port": port, **dashboard}
    cluster: Any = Cluster(initialize_head=True, head_node_args=head_args)
    head = cluster.head_node
    try:
        say({"address": cluster.address, "dashboard": f"http://{head.webui_url}"})
        for line in sys.stdin:
            if line.strip() == "worker":
                node = cluster.add_node(num_cpus=CPUS)
                say(node.all_processes["raylet"][0].process.pid)
            else:
                head.kill_gcs_server(check_alive=False)  # it is dead: this makes Ray forget it
                head.start_gcs_server()
                say(None)
    finally:
        cluster.shutdown()


def say(answer: object) -> None:
    """Answer on stdout, where Ray may print too."""
    print(f"nodes: {json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()
