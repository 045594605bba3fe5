package main

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// The README's first command makes a model in a fresh clone, where init refuses a directory that holds anything, and the
// programs of the README and of docs/training.md train that model unless told otherwise.
func TestREADMEModelDirectoryIsFreeInAClone(t *testing.T) {
	root := filepath.Join("..", "..")
	match := func(file, pattern string) string {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(root, file))
		if err != nil {
			t.Fatal(err)
		}
		m := regexp.MustCompile(pattern).FindSubmatch(text)
		if m == nil {
			t.Fatalf("%s: nothing matches %q", file, pattern)
		}
		return string(m[1])
	}
	made := match("README.md", `trainerd init [^\n]*dir:([\w/-]+)`)
	for _, file := range []string{"README.md", "docs/training.md"} {
		if used := match(file, `else "dir:([\w/-]+)"`); used != made {
			t.Errorf("%s trains dir:%s, but README.md makes dir:%s", file, used, made)
		}
	}
	// Whoever has followed the README has the directory, as a model.
	if _, err := os.Stat(filepath.Join(root, made)); err == nil {
		if _, err := os.Stat(filepath.Join(root, made, "config.json")); err != nil {
			t.Errorf("README.md makes a model in %s, which the repository has for something else", made)
		}
	}
}
