package storage

import (
	"strings"

	"trainerd/internal/fault"
)

// Location is a parsed store address. Scheme is "dir" (Path) or "s3" (Bucket, Prefix).
type Location struct {
	Scheme string
	Path   string // of a directory, as given
	Bucket string
	Prefix string // without leading and trailing slashes, may be empty
}

// String returns the address in the form that ParseURL reads.
func (l Location) String() string {
	switch {
	case l.Scheme == "dir":
		return "dir:" + l.Path
	case l.Prefix == "":
		return "s3://" + l.Bucket
	default:
		return "s3://" + l.Bucket + "/" + l.Prefix
	}
}

// ParseURL reads "dir:PATH" or "s3://bucket/prefix". Credentials have no place in it.
func ParseURL(url string) (Location, error) {
	bad := func(expected string) (Location, error) {
		shown := url
		if strings.Contains(url, "@") {
			shown = "an address with @" // it may hold a password
		}
		return Location{}, fault.BadField("store", shown, expected)
	}
	if path, ok := strings.CutPrefix(url, "dir:"); ok {
		if path == "" || strings.ContainsRune(path, 0) {
			return bad("dir:PATH with a path")
		}
		return Location{Scheme: "dir", Path: path}, nil
	}
	rest, ok := strings.CutPrefix(url, "s3://")
	if !ok {
		return bad("dir:PATH or s3://bucket/prefix")
	}
	bucket, prefix, _ := strings.Cut(rest, "/")
	prefix = strings.Trim(prefix, "/")
	if !bucketName(bucket) {
		return bad("s3://bucket/prefix with a bucket of 3 to 63 lower-case letters, digits, dots and hyphens")
	}
	if prefix != "" {
		if why := keyFault(prefix); why != "" {
			return bad("a prefix with " + why)
		}
	}
	return Location{Scheme: "s3", Bucket: bucket, Prefix: prefix}, nil
}

func bucketName(name string) bool {
	if len(name) < 3 || len(name) > 63 {
		return false
	}
	for i := range len(name) {
		c := name[i]
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !alnum && (c != '-' && c != '.' || i == 0 || i == len(name)-1) {
			return false
		}
	}
	return true
}
