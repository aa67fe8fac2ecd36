"""The tests in peers/ need the peers: ``make compat`` runs them, each in an environment of its own."""

collect_ignore = ["peers"]
