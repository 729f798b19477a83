"""What a training program needs around the model: text, masks of batches, measurements, records, display.

Only ``loop`` and ``evaluation`` talk to other processes; elsewhere ranks and world sizes are arguments.
"""
