//go:build !linux

package spool

import (
	"errors"
	"os"
)

// openDirect is for Linux.
func openDirect(string) (*os.File, error) { return nil, errors.ErrUnsupported }
