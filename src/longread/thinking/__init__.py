"""Agents that think before they act."""
