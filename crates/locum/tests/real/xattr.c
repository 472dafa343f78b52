// Extended attributes for the guest, whose busybox has no command for them.
// xattr FILE NAME VALUE sets one; xattr FILE... prints all of each.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/xattr.h>

static void list(const char *file) {
	char names[4096], value[4096];
	ssize_t size = listxattr(file, names, sizeof names);
	if (size < 0) {
		perror(file);
		exit(1);
	}
	for (char *name = names; name < names + size; name += strlen(name) + 1) {
		ssize_t length = getxattr(file, name, value, sizeof value);
		if (length < 0) {
			perror(name);
			exit(1);
		}
		printf("%s %s=%.*s\n", file, name, (int)length, value);
	}
}

int main(int argc, char **argv) {
	if (argc == 4 && strncmp(argv[2], "user.", 5) == 0) {
		if (setxattr(argv[1], argv[2], argv[3], strlen(argv[3]), 0) == 0)
			return 0;
		perror(argv[1]);
		return 1;
	}
	for (int i = 1; i < argc; i++)
		list(argv[i]);
	return 0;
}
