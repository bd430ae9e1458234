"""Shared by all: random numbers, config checks, run folders, loggers, the console."""
