"""A folder for each method: models, losses, updates and the loop that trains them."""
