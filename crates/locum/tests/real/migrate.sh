# The work of a guest that migrates: migrate.sh FOLDER. Before, it opens what it goes on with afterwards; it writes numbered
# lines, and makes, renames and deletes files, until `stop` is there. find-paths cannot carry a deleted
# file: with deletes=false there is none.
set -eu
cd "$1"
fail() {
	echo "migrate.sh: $*" >&2
	exit 1
}
sum() {
	sha256sum | cut -d ' ' -f 1
}

mkdir -p kept/folder turn
seq 1 3000 > /tmp/data
expected=$(sum < /tmp/data)
for i in 1 2 3 4 5 6 7 8 9; do
	cp /tmp/data kept/$i
done
cp /tmp/data kept/gone
cp /tmp/data kept/name
cp /tmp/data kept/folder/inner
ln -s ../kept/1 kept/link
exec 3< kept/name 4>> kept/name 7< kept/folder/inner
mv kept/name kept/renamed
mv kept/folder kept/moved
if [ "$deletes" = true ]; then
	exec 5< kept/gone 6>> kept/gone
	rm kept/gone
fi
exec 8>> lines 9< kept/moved

i=0
touch turn/0
echo "guest: ready"
while [ ! -e stop ]; do
	i=$((i + 1))
	echo $i >&8
	if [ "$deletes" = true ]; then
		echo $i > turn/new
		mv turn/new turn/$((i % 10))
		[ $((i % 4)) != 0 ] || rm turn/$((i % 10))
	else
		mv turn/$((i - 1)) turn/$i
	fi
done
echo "guest: $i lines"

# What follows is asked of the share, not of the guest's cache.
sync
echo 3 > /proc/sys/vm/drop_caches
seq 1 $i | cmp - lines || fail "lines"
[ "$(sum <&3)" = "$expected" ] || fail "a renamed file"
[ "$(sum <&7)" = "$expected" ] || fail "a file in a renamed folder"
echo more >&4
[ "$(tail -n 1 kept/renamed)" = more ] || fail "what was written to the renamed file is not in it"
# To the guest a file with two handles would be two, each with a size of its own.
exec 3< kept/renamed
cat <&3 > /dev/null
echo again >&4
[ "$(cat <&3)" = again ] || fail "the renamed file has two handles"
[ kept/renamed -ef /proc/self/fd/4 ] || fail "the renamed file is another one"
[ kept/moved -ef /proc/self/fd/9 ] || fail "the renamed folder is another one"
[ "$(ls /proc/self/fd/9/)" = inner ] || fail "the renamed folder"
if [ "$deletes" = true ]; then
	[ ! -e kept/gone ] || fail "a deleted file is there"
	echo more >&6
	[ "$(cat <&5)" = "$(cat /tmp/data; echo more)" ] || fail "a deleted file"
fi
for j in 1 2 3 4 5 6 7 8 9 link; do
	[ "$(sum < kept/$j)" = "$expected" ] || fail "file $j"
done
