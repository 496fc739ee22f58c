"""The public operations, one file a policy family."""
