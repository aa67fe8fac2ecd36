"""``python -m ci.compat [PEER ...]`` (``make compat``): the libraries that pyattr.compat stands in for, run with it.

Each peer gets an environment of its own, since their pins clash. In it run our end-to-end tests with the peer, and the peer's
own tests, taken from its source distribution, against our stand-in.
"""
