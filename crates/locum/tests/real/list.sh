# The listing: list.sh FOLDER prints everything there is to know of everything below.
set -eu
cd "$1"
find . -mindepth 1 -type d -exec stat -c '%A %n' {} +
find . ! -type d -exec stat -c '%A %h %n' {} +
find . -type f -exec stat -c '%s %n' {} +
# Nobody but the host's root may read the secret.
find . -type f ! -name secret -exec sha256sum {} +
find . -type l | while read -r link; do echo "$link -> $(readlink "$link")"; done
find . \( -type f -o -type d \) ! -name secret -exec xattr {} +
