"""LiDAR, the rank of what tells images apart beyond their views, as a measurement of the `evaluate` library."""

import datasets
import evaluate
import numpy as np
import torch

from trainers.diagnostics import lidar

_CITATION = """@inproceedings{thilak2024lidar,
  title={LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL Architectures},
  author={Thilak, Vimal and Huang, Chen and Saremi, Omid and Dinh, Laurent and Goh, Hanlin and Nakkiran, Preetum and
    Susskind, Joshua M. and Littwin, Etai},
  booktitle={ICLR}, year={2024}
}"""


class LiDAR(evaluate.Measurement):
    """`compute(data=embeddings)`, (n, q, D) numbers, q views of each image, gives `{"lidar": float}`."""

    def _info(self):
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description="LiDAR: the effective rank of a linear discriminant analysis whose classes are the images.",
            citation=_CITATION,
            inputs_description="data (n, q, D): embeddings of q views of n images; delta (1e-4), added to the "
            "variance of views. Gives lidar, from 1 (collapsed) to min(n - 1, D).",
            features=datasets.Features({"data": datasets.Sequence(datasets.Sequence(datasets.Value("float32")))}),
        )

    def _compute(self, data, delta=1e-4):
        return {"lidar": lidar(torch.from_numpy(np.asarray(data, dtype=np.float32)), delta)}
