# The work: work.sh FOLDER TAR. It runs in the guest, on the share, and natively on the host: what it leaves behind must be
# the same, and on the way it checks everything that it can. The host's root has put `special` there before.
set -eu
cd "$1"
tar=$2
work=/tmp/work.$$
umask 022
mkdir -p $work

# In the guest, what was read comes from its cache unless that is emptied; natively the disk is believed.
forget() {
	sync
	[ "$1" = share ] && echo 3 > /proc/sys/vm/drop_caches || true
}
fail() {
	echo "work.sh: $*" >&2
	exit 1
}

echo "step: create, write, read back"
mkdir data
for i in 1 2 3 5 8 13 21 34 55 89; do
	seq 1 $((i * 500)) > data/$i
	seq 1 $((i * 500)) | sha256sum | sed "s|-|data/$i|" >> $work/sums
done
forget "${3:-}"
sha256sum -c -s $work/sums || fail "read back something else"
echo appended >> data/1
printf CHANGED | dd of=data/2 bs=1 seek=1000 conv=notrunc 2>/dev/null
truncate -s 777 data/3
truncate -s 100000 data/5
[ "$(tail -n 1 data/1)" = appended ] || fail append
[ "$(dd if=data/2 bs=1 skip=1000 count=7 2>/dev/null)" = CHANGED ] || fail overwrite
[ "$(stat -c %s data/3)" = 777 ] || fail truncate

echo "step: rename, link, unlink"
mkdir -p names/a/b names/c
echo one > names/one
echo two > names/two
mv names/one names/a/b/uno
mv -f names/two names/a/b/uno
mv names/a/b names/c/moved
[ "$(cat names/c/moved/uno)" = two ] || fail rename
ln names/c/moved/uno names/linked
[ "$(stat -c %h names/linked)" = 2 ] || fail link
[ names/linked -ef names/c/moved/uno ] || fail "link is another file"
echo gone > names/gone
exec 3< names/gone 4>> names/gone
rm names/gone
echo more >&4
[ "$(cat <&3)" = "gone
more" ] || fail "a deleted file, still open"
exec 3<&- 4>&-
[ ! -e names/gone ] || fail unlink
mkdir names/empty
rmdir names/empty
rmdir names/c 2>/dev/null && fail "rmdir of a full folder"

echo "step: chmod"
mkdir modes
for mode in 600 640 644 755 4755 1777; do
	touch modes/$mode
	chmod $mode modes/$mode
done
mkdir modes/folder
chmod 2750 modes/folder

echo "step: symbolic links, a pipe"
mkdir links
ln -s ../data/1 links/file
ln -s ../names links/folder
ln -s nowhere links/dangling
[ "$(readlink links/dangling)" = nowhere ] || fail readlink
cmp links/file data/1 || fail "through a symbolic link"
[ "$(cat links/folder/linked)" = two ] || fail "through a symbolic link to a folder"
mv links/dangling links/lost
ln links/lost links/twice
mkfifo links/pipe
echo through > links/pipe &
[ "$(cat links/pipe)" = through ] || fail pipe

echo "step: what the host made"
for round in 1 2 3; do
	forget "${3:-}"
	[ -c special/null ] || fail "a character device"
	[ -b special/loop ] || fail "a block device"
	[ -p special/pipe ] || fail "a pipe"
	[ -S special/socket ] || fail "a socket"
	[ "$(readlink special/link)" = /nowhere ] || fail "a link"
	[ "$(stat -c %s special/secret)" = 7 ] || fail "a file that may not be read"
	[ "${unprivileged:-}" != true ] || ! cat special/secret 2>/dev/null || fail "read what may not be read"
done
mv special/socket special/moved
mv special/pipe special/null special/inner
rm special/link

echo "step: extended attributes"
xattr data/1 user.colour blue
xattr data/1 user.colour green
xattr data user.folder yes
[ "$(xattr data/1)" = "data/1 user.colour=green" ] || fail xattr

echo "step: 2,000 small files"
mkdir many
i=0
while [ $i -lt 2000 ]; do
	[ $((i % 100)) != 0 ] || mkdir many/$((i / 100))
	echo "small $i" > many/$((i / 100))/$i
	i=$((i + 1))
done
forget "${3:-}"
find many -type f -exec cat {} + | sort > $work/small
i=0
while [ $i -lt 2000 ]; do
	echo "small $i"
	i=$((i + 1))
done | sort | cmp - $work/small || fail "small files"

echo "step: tar"
mkdir tar $work/tar
tar -xof "$tar" -C tar
tar -xof "$tar" -C $work/tar
forget "${3:-}"
diff -r tar $work/tar || fail "what was unpacked"
rm -r $work
