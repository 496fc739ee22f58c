"""A reward learned from a CSV file (extra sklearn): `python examples/csv_reward.py data.csv label`, or from wine."""

import sys

import pandas
from po_bilevel import BilevelClassifier
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def compare(frame, label):
    """Held-out negative log-likelihood by method, and the fitted classifier."""
    inputs, labels = pandas.get_dummies(frame.drop(columns=label)), frame[label]
    train_x, test_x, train_y, test_y = train_test_split(inputs, labels, test_size=0.3, random_state=0, stratify=labels)
    methods = {
        "reward learned": BilevelClassifier(random_state=0),
        "penalty cross-validated": GridSearchCV(
            LogisticRegression(max_iter=5000), {"C": [10.0**k for k in range(-4, 5)]}, scoring="neg_log_loss"
        ),
    }
    found = {}
    for name, method in methods.items():
        fitted = make_pipeline(StandardScaler(), method).fit(train_x, train_y)
        found[name] = log_loss(test_y, fitted.predict_proba(test_x), labels=fitted.classes_)
    return found, methods["reward learned"]


if __name__ == "__main__":
    if len(sys.argv) == 3:
        table, column = pandas.read_csv(sys.argv[1]), sys.argv[2]
    else:
        table, column = load_wine(as_frame=True).frame, "target"
    losses, classifier = compare(table, column)
    for each, loss in losses.items():
        print(f"{each:24} {loss:.3f} nats a row")
    print("learned reward:", classifier.reward_)
