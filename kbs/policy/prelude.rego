# What every policy of this broker may call besides Rego's own functions.
package policy

import rego.v1

# The reference value of this name, or null when there is none in force (Trustee's extension).
query_reference_value(id) := object.get(data.reference_values, id, null)
