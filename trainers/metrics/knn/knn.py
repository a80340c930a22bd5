"""Accuracy of the weighted nearest neighbours, as a metric of the `evaluate` library."""

import datasets
import evaluate
import numpy as np
import torch

from trainers.probes import knn_predict

_CITATION = """@inproceedings{wu2018unsupervised,
  title={Unsupervised Feature Learning via Non-Parametric Instance Discrimination},
  author={Wu, Zhirong and Xiong, Yuanjun and Yu, Stella X. and Lin, Dahua},
  booktitle={CVPR}, year={2018}
}"""


class KNN(evaluate.Metric):
    """
    `compute(predictions=embeddings, references=labels, train_embeddings=..., train_labels=...)` gives
    `{"knn": float}`, the share of right votes, from 0 to 1.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy of the k nearest train embeddings' votes, weighted by exp(cosine / temperature).",
            citation=_CITATION,
            inputs_description="predictions (m, D): embeddings to classify; references (m,): their classes, from 0; "
            "train_embeddings (n, D), train_labels (n,): those that vote; k (20), temperature (0.07). Gives knn, from "
            "0 to 1.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions, references, train_embeddings, train_labels, k=20, temperature=0.07):
        test_x, train_x = (torch.from_numpy(np.asarray(x, dtype=np.float32)) for x in (predictions, train_embeddings))
        test_y, train_y = (torch.from_numpy(np.asarray(y, dtype=np.int64)) for y in (references, train_labels))
        if len(train_x) != len(train_y):
            raise ValueError(
                f"{len(train_x)} train_embeddings and {len(train_y)} train_labels do not go together; give as many."
            )
        num_classes = int(max(train_y.max(), test_y.max())) + 1
        found = knn_predict(train_x, train_y, test_x, num_classes, k, temperature)
        return {"knn": (found == test_y).double().mean().item()}
