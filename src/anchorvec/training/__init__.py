"""Stages: an embedder folder and an objective become a trained folder."""
