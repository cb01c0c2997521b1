"""What happens to a Trainer run: metrics attached, facts collected, the report written and pushed."""
