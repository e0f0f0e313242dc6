"""What a run shows and records; nothing here waits for the device within a step."""
