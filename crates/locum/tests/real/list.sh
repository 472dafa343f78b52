# The listing: list.sh FOLDER prints everything there is to know of everything below.
set -eu
cd "$1"
find . -mindepth 1 -type d -exec stat -c '%A %n' {} +
find . ! -type d -exec stat -c '%A %h %n' {} +
find . -type f -exec stat -c '%s %n' {} +
find . -type f -exec sha256sum {} +
find . -type l | while read -r link; do echo "$link -> $(readlink "$link")"; done
find . \( -type f -o -type d \) -exec xattr {} +
