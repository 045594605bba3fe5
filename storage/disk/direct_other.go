//go:build !linux

package disk

import (
	"errors"
	"os"
)

// setDirect says that files are written through the page cache only.
func setDirect(*os.File, bool) error { return errors.ErrUnsupported }
