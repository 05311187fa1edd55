"""`python -m genai <command>`: the console command `genai`."""

from genai.commands import main

if __name__ == "__main__":
    main()
