# Resource policy that allows nothing, e.g. for one prefix while it is being prepared.
package policy

import rego.v1

default allow := false
