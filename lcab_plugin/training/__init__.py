"""What a training program needs around the model: text, masks of batches, measurements, records, display.

Nothing here talks to other processes: ranks and world sizes are arguments.
"""
