"""What is known of each task before anything runs: numbers, and the mathematics of goals and rewards."""
