"""Draw pictures: python scripts/sample.py --model MODEL "a cat" "a dog --ar 3:4" "a house --hw 768:1024" …"""

from pixart.commands import run

if __name__ == "__main__":
    run("sample")
