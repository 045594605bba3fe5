package spool

import (
	"os"
	"syscall"
)

// openDirect opens a file for writes that pass the page cache by, which nobody
// would read from. Many file systems refuse.
func openDirect(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|syscall.O_DIRECT, 0)
}
