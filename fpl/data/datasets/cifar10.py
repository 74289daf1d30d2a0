"""CIFAR-10 (Krizhevsky, 2009)."""

from fpl.data.datasets.layouts import Dataset, File, cifar

BATCHES = cifar(
    train=[f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)],
    test="cifar-10-batches-py/test_batch",
    meta="cifar-10-batches-py/batches.meta",
    names="label_names",
    labels="labels",
)

DATASET = Dataset(
    key="cifar10",
    title="CIFAR10",
    position=6,
    folders=("cifar10", "cifar-10"),
    classes=10,
    layouts={"torchvision": BATCHES},
    page="https://www.cs.toronto.edu/~kriz/cifar.html",
    terms="No licence is stated; the authors ask for a citation of their report.",
    files=(
        File(
            "cifar10/cifar-10-python.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            size=170498071,
            md5="c58f30108f718f92721af3b95e74349a",
        ),
    ),
)
