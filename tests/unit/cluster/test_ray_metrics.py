"""What is copied to Ray's metrics."""

from borg_serve import metrics
from borg_serve.cluster.ray_metrics import PREFIXES


def test_ray_metrics_copies_all_of_ours() -> None:
    names = [family.name for offered in metrics.__all__ for family in getattr(metrics, offered).describe()]
    assert names
    assert [name for name in names if not name.startswith(PREFIXES)] == []
