"""Options shared by the two test trees."""


def pytest_addoption(parser):
    parser.addoption("--golden-dir", default=None, help="folder of golden .npz files (default: the shipped one)")
    parser.addoption("--trajectories", default=None, help="npz file of recorded simulator trajectories")
    parser.addoption("--upstream", default=None, help="path of a checkout of the PyTorch reference, compared live")
