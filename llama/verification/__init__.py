"""Whether a folder, this code and this machine give the model's numbers: `checkup` runs all checks, the other files
hold them. A check is a function that returns a `Result`, or several."""
