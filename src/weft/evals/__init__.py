"""Measuring models: statistics with intervals, a resumable runner, one file for each benchmark."""
