"""Runs the console command `genai` as `python -m genai <command>`."""

from genai.commands import main

if __name__ == "__main__":
    main()
