"""Top-1 and top-5 accuracy, as a metric of the `evaluate` library that works offline."""

import datasets
import evaluate
import numpy as np

from trainers.probes import top_accuracies


class TopAccuracy(evaluate.Metric):
    """
    `compute(predictions=ranked, references=labels)` gives `{"accuracy": float}` and, of five ranks or more,
    `"top5_accuracy"`, from 0 to 1.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of images whose class is the likeliest, or among the likeliest five.",
            citation="",
            inputs_description="predictions (m, k): class indices of each image, the likeliest first; references "
            "(m,): the right ones. Gives accuracy and, if k is 5 or more, top5_accuracy, from 0 to 1.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        return top_accuracies(np.asarray(predictions), np.asarray(references))
