"""Rewards and policies of text."""
