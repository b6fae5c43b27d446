"""The template's own test runs where it was scaffolded, not here."""

collect_ignore_glob = ["template/*"]
