"""RankMe, LiDAR, kNN and top accuracy as modules of the `evaluate` library, which work offline:
`pip install -e ".[evaluate]"`.

By import: `from trainers.metrics import RankMe; RankMe().compute(data=embeddings)`. By path, this package installed:
`evaluate.load("trainers/metrics/rankme")`. With several processes give each `num_process`, `process_id` and
`experiment_id`, as to any module of `evaluate`.
"""

from trainers.metrics.knn.knn import KNN
from trainers.metrics.lidar.lidar import LiDAR
from trainers.metrics.rankme.rankme import RankMe
from trainers.metrics.top_accuracy.top_accuracy import TopAccuracy

__all__ = ["KNN", "LiDAR", "RankMe", "TopAccuracy"]
