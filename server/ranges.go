package server

import (
	"fmt"
	"net/http"
	"strings"

	"trainerd/internal/fault"
)

// maxRanges is the most ranges of one request. Each is an opening of the store's
// object, and thousands fit into one header (RFC 9110 section 14.2 lets a server
// refuse many).
const maxRanges = 16

// fewRanges refuses a request for more parts of a file than anybody needs.
func fewRanges(r *http.Request) error {
	n := 0
	for _, v := range r.Header.Values("Range") {
		n += 1 + strings.Count(v, ",")
	}
	if n > maxRanges {
		return fault.BadField("Range", fmt.Sprintf("%d ranges", n), fmt.Sprintf("at most %d", maxRanges))
	}
	return nil
}
